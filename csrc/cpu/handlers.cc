#include "handlers.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "../handlers.h"
#include "kernels.h"

namespace jax_rmsnorm {
namespace {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements that a task has at the least, and elements that a forward does at once: enough work to pay for
// another thread. The backward's are more work each.
constexpr int64_t kTaskElements = 32 * 1024;
constexpr int64_t kSerialElements = 128 * 1024;

// How often the caller looks for the end of the last tasks before it sleeps: waking up takes as long.
constexpr int kYields = 100;

// About how many tasks there are at the least where rows are long enough: work for the cores of most
// machines.
constexpr int64_t kFewTasks = 32;

// Rows that make a task, out of `rows` in all: of many, as many as there are tasks then. The backward sums
// dgamma over the rows of a task first and then over the tasks, which together are fewest so.
int64_t RowsPerTask(int64_t rows, int64_t hidden) {
  const auto root = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(rows))));
  return std::max<int64_t>({1, std::min(root, CeilDiv(rows, kFewTasks)), kTaskElements / hidden});
}

// Runs run(0), ..., run(tasks - 1) on XLA's threads and on this one. This thread takes tasks like the others
// and waits only for those under way, so that it comes to an end also where it is the pool's only free
// thread. It begins at the front and they at the back: of two threads, each meets the rows of the last call
// again, which its cache may hold.
void ParallelFor(ffi::ThreadPool& pool, int64_t tasks, const std::function<void(int64_t)>& run) {
  const int64_t helpers = std::min(pool.num_threads(), tasks) - 1;
  if (helpers <= 0) {
    for (int64_t task = 0; task < tasks; ++task) run(task);
    return;
  }
  struct State {
    std::atomic<int64_t> taken{0}, from_back{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const auto state = std::make_shared<State>();  // a thread may come when all is over and the caller gone
  const auto help = [state, tasks, &run] {
    int64_t finished = 0;
    for (; state->taken.fetch_add(1) < tasks; ++finished) run(tasks - 1 - state->from_back.fetch_add(1));
    if (finished == 0 || state->done.fetch_add(finished) + finished < tasks) return;
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->all_done.notify_one();
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(help));
  int64_t finished = 0;
  for (; state->taken.fetch_add(1) < tasks; ++finished) run(finished);
  state->done += finished;
  const auto all_done = [&] { return state->done == tasks; };
  for (int i = 0; i < kYields && !all_done(); ++i) std::this_thread::yield();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, all_done);
}

void Run(const ForwardArgs& args, ffi::ThreadPool& pool) {
  const int64_t rows = args.shape.groups * args.shape.rows;
  const bool serial = rows * args.shape.hidden <= kSerialElements;
  const int64_t rows_per_task = serial ? std::max<int64_t>(1, rows) : RowsPerTask(rows, args.shape.hidden);
  const CpuKernels& kernels = ActiveKernels();
  ParallelFor(pool, CeilDiv(rows, rows_per_task), [&](int64_t task) {
    kernels.forward(args, task * rows_per_task, std::min(rows, (task + 1) * rows_per_task));
  });
}

// The split of the rows into tasks, one partial row each, follows from the shape alone: dgamma has the same
// bits on any number of threads.
void Run(const BackwardArgs& args, ffi::ThreadPool& pool) {
  const Shape& shape = args.shape;
  const int64_t wanted = CeilDiv(shape.rows, RowsPerTask(shape.rows, shape.hidden));
  const int64_t most = args.dgamma == nullptr ? shape.rows : std::min(shape.rows, args.partial_rows);
  const int64_t tasks_per_group = std::max<int64_t>(1, std::min(wanted, most));
  const int64_t rows_per_task = CeilDiv(shape.rows, tasks_per_group);
  const CpuKernels& kernels = ActiveKernels();
  ParallelFor(pool, shape.groups * tasks_per_group, [&](int64_t task) {
    const int64_t group = task / tasks_per_group;
    const int64_t part = task % tasks_per_group;
    float* partial =
        args.dgamma == nullptr ? nullptr : args.partials + (group * args.partial_rows + part) * shape.hidden;
    kernels.backward(args, group, std::min(shape.rows, part * rows_per_task),
                     std::min(shape.rows, (part + 1) * rows_per_task), partial);
  });
  if (args.dgamma == nullptr) return;

  const int64_t columns_per_task = std::max<int64_t>(256, kSerialElements / tasks_per_group);
  const int64_t finish_tasks = CeilDiv(shape.hidden, columns_per_task);
  ParallelFor(pool, shape.groups * finish_tasks, [&](int64_t task) {
    const int64_t first = task % finish_tasks * columns_per_task;
    kernels.finish(args, task / finish_tasks, tasks_per_group, first,
                   std::min(shape.hidden, first + columns_per_task));
  });
}

struct Cpu {
  using Context = ffi::ThreadPool;

  template <typename Args>
  static ffi::Error Launch(const Args& args, int64_t /*sm_margin*/, Context pool) {
    Run(args, pool);
    return ffi::Error::Success();
  }
};

}  // namespace

#define JAX_RMSNORM_DEFINE_HANDLER(name) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Cpu##name, name<Cpu>, name##Binding().Ctx<ffi::ThreadPool>())

JAX_RMSNORM_DEFINE_HANDLER(Forward);
JAX_RMSNORM_DEFINE_HANDLER(AddForward);
JAX_RMSNORM_DEFINE_HANDLER(RopeForward);
JAX_RMSNORM_DEFINE_HANDLER(Backward);
JAX_RMSNORM_DEFINE_HANDLER(AddBackward);
JAX_RMSNORM_DEFINE_HANDLER(RopeBackward);

}  // namespace jax_rmsnorm
