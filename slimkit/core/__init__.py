"""The framework-free half of slimkit: mathematics, configuration, formats and reports, written once for both wings."""
