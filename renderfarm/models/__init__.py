"""Model families. `catalog` tells what a model is without loading it; each family's module loads and runs it."""
