"""Inputs that once failed, by kind, and what is right."""

# ---------------------------------------- files, folders and autoencoders


# ---------------------------------------- command lines, configs, launchers, signals, output


# ---------------------------------------- weights, classes, loaders, training and evaluation
