"""megatron_opd: large-scale on-policy distillation with Megatron-Core students and SGLang teachers."""

__version__ = "0.1.0"
