"""Several processes: the real wrappers run under a fake process group, seen from one rank."""
