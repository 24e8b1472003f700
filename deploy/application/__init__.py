"""What the Ray Serve application is made of, besides its deployments: see `serve_app`."""
