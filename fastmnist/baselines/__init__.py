"""Other ways to load the same samples, behind Loader's interface."""
