#include "native.hpp"

extern "C" const fd_loss_table FD_SYMBOL(fd_losses) = {
    {
        {FD_NS::softmax_block<float, true>, FD_NS::softmax_block<double, true>},
        {FD_NS::softmax_block<float, false>, FD_NS::softmax_block<double, false>},
        {FD_NS::element_block<float, FD_NS::binary_point>, FD_NS::element_block<double, FD_NS::binary_point>},
        {FD_NS::element_block<float, FD_NS::mse_point>, FD_NS::element_block<double, FD_NS::mse_point>},
    },
    {FD_NS::sum_of<float>, FD_NS::sum_of<double>},
};
