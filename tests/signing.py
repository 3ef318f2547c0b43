"""A key pair of the tests, made by minisign 0.11 with `minisign -G -W`; it locks nothing."""

SECRET = (
    "untrusted comment: minisign encrypted secret key\n"
    "RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAJpD3jUkK4PtMJ4Q6aN4b"
    "WfVGyKV3MXGMi5fZPUxRsr+2h1zrWKJr8vubl32tbnFMN294rNczpy4y809aUy4Cm3lXZbIvD5azAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAA=\n"
)
PUBLIC = "RWQmkPeNSQrg+/ubl32tbnFMN294rNczpy4y809aUy4Cm3lXZbIvD5az"
