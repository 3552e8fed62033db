"""Circuit-breaker training (representation rerouting) with a KL term to the frozen teacher."""
