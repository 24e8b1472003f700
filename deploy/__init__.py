"""What a user meets: settings, command line, HTTP API and the Serve application."""
