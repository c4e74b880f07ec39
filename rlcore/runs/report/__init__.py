"""What a run leaves for its readers: report.html, one page without a network, and a model card."""
