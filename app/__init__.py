"""The app: watch adaptive depth at work. Tensors stay behind ``app.service``."""
