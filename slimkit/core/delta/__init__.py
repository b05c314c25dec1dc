"""Delta layers without a framework: specifications, book-keeping, bundles and PEFT's files."""
