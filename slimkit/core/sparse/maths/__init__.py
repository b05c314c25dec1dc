"""The mathematics of sparsity over the array API: no model, no file, no framework."""
