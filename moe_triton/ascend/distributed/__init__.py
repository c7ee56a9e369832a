"""Dispatch and combine between ranks: fused, with residual and RMSNorm, and in split phases."""
