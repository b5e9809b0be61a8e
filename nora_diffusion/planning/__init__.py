"""``nora plan``: what an adapter would cost on a model of any size, from its config alone."""
