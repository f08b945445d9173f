"""`builtin:shapes`: a tiny latent diffusion model of drawn shapes, its training and its evaluation."""
