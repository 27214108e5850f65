"""DiM: the backbone, its operators, samplers and training, as plain modules."""
