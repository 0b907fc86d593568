"""Rate limits: permits for API keys and merchants, failed authentications of addresses, response fields."""
