"""The net of two layers that the delta kinds are tried on."""


def build(kit):
    net = kit.named(up=kit.linear(6, 8), act=kit.relu(), down=kit.linear(8, 4, bias=False))
    kit.train_mode(kit.fill(net), False)
    return net
