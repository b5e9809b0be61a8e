"""``nora campaign``: a ``nora-dreambooth`` run for each line of a table, on any machines."""
