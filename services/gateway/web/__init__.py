"""The web interface: pages made on the server, small scripts, nothing from elsewhere."""
