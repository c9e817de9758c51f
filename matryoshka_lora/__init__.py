"""MatryoshkaLoRA (arXiv 2605.07850): fine-tune an LLM once, use the adapter at any rank."""

__version__ = "0.1.0"
