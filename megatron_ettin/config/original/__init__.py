"""Read the configuration of the original trainer."""
