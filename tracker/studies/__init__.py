"""Questions of the paper and of its reviewers, each as a command over an experiment file."""
