"""The commands: ``qpd`` (the daemon) and ``qpctl`` (its operator)."""
