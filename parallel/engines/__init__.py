"""The two engines that train weights: DeepSpeed's ZeRO for the encoder, Megatron-core's optimizer for the LLM."""
