"""Checkpoints of others, in and out: Hugging Face's layout of Llama, Mistral, Qwen2/2.5 and Qwen3,
SpikingBrain's gla_swa, and GGUF files (in only).
"""

from models.io.read import Foreign, is_foreign, read_foreign
from models.io.write import ExportPlan, plan_export

__all__ = ["ExportPlan", "Foreign", "is_foreign", "plan_export", "read_foreign"]
