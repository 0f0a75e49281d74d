"""The mathematics of low-rank adaptation: roles of dimensions, ops, inits, variants, parts."""
