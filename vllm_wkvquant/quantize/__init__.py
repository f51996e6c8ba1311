"""Offline: a Hugging Face causal LM goes in, a checkpoint with 4-bit weights and calibrated KV parameters comes out.

Read pipeline.py first; it calls plan (adapters, calibration), blocks (fold, learn, weights, kv), state and writer.
Nothing here imports vllm.
"""
