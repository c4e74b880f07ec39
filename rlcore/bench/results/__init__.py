"""Results of a benchmark: files, tables, plots, comparison."""
