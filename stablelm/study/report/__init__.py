"""From the results of a study to its page, tables and figures."""
