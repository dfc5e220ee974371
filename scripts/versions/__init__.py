"""Which Megatron-LM versions the plugin runs with: tried, and compared with what the documents say.

python -m scripts.versions                      try them all, print the table
python -m scripts.versions --check docs/compatibility.md
MEGATRON_PATHS=a:b python -m scripts.versions   checkouts too, with their own pretrain_gpt.py
"""
