// All that runs in double precision on the device: the kernels for float64 tensors, and the last sum of the movement.
// It stands apart so that every other file can be compiled with double precision forbidden.
#include "gate.cuh"
#include "gated_adam.cuh"
#include "linear_head.cuh"
#include "mutual_information.cuh"
#include "objective.cuh"

namespace ffw::cuda {

template void launch_gate_weight(GateWeightArguments<double, double>, Kind, cudaStream_t);
template void launch_gate_weight_backward(GateWeightBackwardArguments<double, double>, Kind, cudaStream_t);
template void launch_gated_adam(GatedAdamArguments<double, double>, Kind, cudaStream_t);
template void launch_add_movement(double*, const float*, int64_t, cudaStream_t);
template void launch_add_movement(double*, const double*, int64_t, cudaStream_t);
template void launch_fit_linear_head(HeadArguments<double>, cudaStream_t);
template void launch_mutual_information(InformationArguments<double>, cudaStream_t);
template void launch_mutual_information_backward(const InformationBackwardArguments<double>&, cudaStream_t);
template void launch_objective(ObjectiveArguments<double>, cudaStream_t);

}  // namespace ffw::cuda
