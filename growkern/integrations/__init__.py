"""One file per training framework: ``growkern.hf``, ``growkern.lightning``, ``growkern.accelerate``, imported on first use."""
