"""A zoo of generators with known answers: small diffusion models and decoders, and what each of them makes."""
