"""Many runs: which there are, and which of them are still to be started."""
