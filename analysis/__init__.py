"""From a sweep's run directory to the decision about beta_kl; needs neither torch nor Ray."""
