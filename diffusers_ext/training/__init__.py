"""Training scripts, one a method, on one shared loop (`_loop`). Run them as `accelerate launch -m diffusers_ext.training.train_<key>`."""
