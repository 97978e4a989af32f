"""Code that stands in an exported folder beside the files of `model`: what transformers calls, and what replaces
packages and kernels that the folder does without. `jobs.export_code` copies it; nothing else imports it.
"""
