"""The Hugging Face Hub over HTTP: listing, model information and downloads, within its rate limits."""
