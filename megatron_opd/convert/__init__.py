"""``megatron-opd convert``: between Hugging Face folders and Megatron checkpoints."""
