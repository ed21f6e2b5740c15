"""Published numbers, as data.

dverge2020: Yang et al. 2020 (https://arxiv.org/abs/2009.14720), Tables 4 and 5: accuracy in percent, mean of three
runs, 1,000 CIFAR-10 test images, ensembles of ResNet-20. An ``eps0.01`` column is ε = 0.01.
"""
