"""The site of growkern: README, the guides, and a page per public name, method and procedure."""
