"""Imports what generators need: for the server that forks their processes alone, so that classifiers' runs pay nothing."""

from __future__ import annotations

from importlib import import_module

for _name in (
    "PIL.Image",
    "torch",
    "diffusers.models.autoencoders.autoencoder_asym_kl",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "diffusers.models.autoencoders.vq_model",
    "diffusers.models.transformers.dit_transformer_2d",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "probelog.generators.loading",
    "probelog.sandbox.generator_server",
):
    import_module(_name)
