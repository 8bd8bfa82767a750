"""The commands of ``python -m apollo_kernels``, one file each; nothing else imports them."""
