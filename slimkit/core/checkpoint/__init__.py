"""Weight files without a framework: formats, manifests, what is saved and what is loaded."""
