"""The model: a frozen, quantized BERT-family encoder, and the small adapter that is trained.

Only this package knows transformers, peft and bitsandbytes. Start at `fedtune.models.classifier`.
"""
