"""The sweep over beta_kl and kl_temperature: the only package that imports Ray."""
