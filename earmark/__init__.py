"""Label a million sound clips: lists in, Hugging Face audio models, results in SQL."""
