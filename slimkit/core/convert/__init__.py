"""Conversion between the frameworks' checkpoints, decided and streamed without either."""
