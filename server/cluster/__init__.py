"""Several machines as one server: node agents, a conductor above them, stateless gateways. Only ray_backend.py and
join.py know Ray, and only `spectral serve --cluster ray` imports them."""
