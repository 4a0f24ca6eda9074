"""Write models for other programs: Hugging Face folders, one file of weights, peft's adapters."""
